"""From a preset to text with plain Lightning: a few steps on Python's own sources.

python examples/train_and_generate.py
"""

import lightning as L
import torch

import eulerstack as es

spec = es.load("arch_expert_research_mini")
L.seed_everything(spec.training_hints.seed)

module = es.StackModule(spec, lr_peak=3e-3)
data = es.TextData(seq_len=128, batch_size=8)
trainer = L.Trainer(
    max_steps=20, limit_val_batches=2, logger=False, enable_checkpointing=False, default_root_dir="runs/example"
)
trainer.fit(module, data)

tokenizer = es.tokenizer_of(spec.tokenizer_contract)
prompts = [tokenizer.encode("def "), tokenizer.encode("import os\n")]
rows: list[list[int]] = [[], []]
for step in es.generate(module.model.eval(), prompts, max_new_tokens=40, temperature=0.8, seed=0):
    for row, token in zip(rows, step, strict=True):
        if token is not None:
            row.append(token)
for prompt, row in zip(prompts, rows, strict=True):
    print(repr(tokenizer.decode(prompt + row)))

es.save_checkpoint(module.model, "runs/example/checkpoint", tokenizer)
print("parameters:", sum(p.numel() for p in es.load_checkpoint("runs/example/checkpoint").parameters()))
assert torch.isfinite(trainer.callback_metrics["bits_per_byte"])
