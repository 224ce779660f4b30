"""Who executes a training step: one module an engine, all with the interface of `engines.base`."""
