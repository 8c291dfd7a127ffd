"""Language models other than QWen: any decoder of transformers, chosen by the `model_type` of its config.json."""
