"""Pure tensor functions: one folder an operation, one file a provider. They know neither specs nor modules."""
