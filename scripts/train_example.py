"""The training guide's example: python scripts/train_example.py [DATA].

Without DATA it trains on text that comes with Python.
"""

import sys

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import get_dataset

# Load model and tokenizer
model = ConsynLMHeadModel.from_pretrained("verse")
tokenizer = BPETokenizer()

# Prepare dataset
train_dataset = get_dataset(
    data_path=sys.argv[1] if len(sys.argv) > 1 else "sample",
    tokenizer=tokenizer,
    block_size=2048,
)

# Initialize trainer
trainer = ConsynTrainer(
    model=model,
    train_dataloader=train_dataset,
    output_dir="./output",
    num_epochs=3,
    learning_rate=5e-5,
)

# Start training
trainer.train()
