"""Fine-tuning: classification, multiple choice and conversations, with all parameters or LoRA."""
