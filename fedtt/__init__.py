"""The core of fedtt: values and pure functions for federated fine-tuning with tensor-train adapters."""
