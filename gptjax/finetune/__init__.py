"""Fine-tuning: adapters of low rank, and their exchange with other tools."""
