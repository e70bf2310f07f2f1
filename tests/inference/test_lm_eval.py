"""lm-evaluation-harness scores through the server what the model says itself."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import eulerstack as es

from .conftest import MINI, process, solo, words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs pip install 'lm-eval[api]' transformers"),
]

QUESTIONS = [
    {"question": "Two and two are", "choices": [" four", " five", " né"], "answer": 0},
    {"question": "The sky, el cielo, is", "choices": [" green", " blue"], "answer": 1},
    {"question": "def f(x):\n    return", "choices": [" x", " yield", " ñ", " 🙂"], "answer": 0},
]
TASKS = {
    "local_choice": """\
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_words": """\
output_type: generate_until
doc_to_text: question
doc_to_target: ""
generation_kwargs: {until: ["\\u0001"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: bypass}]
""",
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")


def write_byte_tokenizer(folder: Path) -> None:
    """A folder for transformers whose ids are bytes, as those of a byte stack are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bytes_to_unicode()[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def harness(url: str, folder: Path) -> dict[str, list[dict[str, object]]]:
    """The samples of each task, as the harness logs them."""
    model = f"model={MINI},base_url={url}/v1/completions,tokenizer={folder}/tokenizer,num_concurrent=3,max_length=128"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model),
            *("--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks")),
            *("--output_path", str(folder / "out"), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    files = {name: next((folder / "out").rglob(f"samples_{name}_*.jsonl")) for name in TASKS}
    return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}


def likely(model: es.Stack, context: str, choice: str) -> tuple[float, bool]:
    """The log probability of a text after another, and whether it is the greedy one."""
    before, tokens = list(context.encode()), list(choice.encode())
    with torch.inference_mode():
        scores = model(torch.tensor([before + tokens]))[0, len(before) - 1 : -1].log_softmax(-1)
    best = scores.argmax(-1).tolist() == tokens
    return sum(scores[i, token].item() for i, token in enumerate(tokens)), best


def test_the_harness_scores_and_writes_through_the_server(checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    write_byte_tokenizer(tmp_path / "tokenizer")
    with process(checkpoint, "--max-tokens", "128") as (url, _):
        samples = harness(url, tmp_path)
    model = es.load_checkpoint(checkpoint)
    for sample in samples["local_choice"]:
        doc = sample["doc"]
        for answer, choice in zip(sample["filtered_resps"], doc["choices"], strict=True):  # type: ignore[index,call-overload]
            logprob, greedy = likely(model, doc["question"], choice)  # type: ignore[index]
            assert float(answer[0]) == pytest.approx(logprob, abs=1e-3)
            assert str(answer[1]) == str(greedy)
    for sample in samples["local_words"]:
        alone = words(solo(model, sample["doc"]["question"], 12))  # type: ignore[index]
        assert sample["resps"] == [[alone.partition("\x01")[0]]]
