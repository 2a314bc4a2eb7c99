"""Fine-tuning: a pre-trained model learns a task from examples, through `train.fit`."""
