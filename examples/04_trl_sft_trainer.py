"""Train a model to gist with TRL's SFTTrainer. Only the collator is needed.

The collator prepares the data, so SFTTrainer is told not to. Ignore ``num_tokens`` in its log: SFTTrainer sums the mask
to count tokens, but an interval mask holds column numbers.

    pip install trl datasets
    python examples/04_trl_sft_trainer.py PATH_OR_NAME --steps 20 --output runs/trl
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import set_seed

import gisting
from gisting import GistCollator, Record

COLORS = "red green blue white black brown".split()
RECORDS = [Record(f"Say {color}.", "What do you say?", color) for color in COLORS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/trl"))
    arguments = parser.parse_args()

    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    set_seed(0)
    model, tokenizer = gisting.load(arguments.model, dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=6,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list([asdict(record) for record in RECORDS]),
        data_collator=GistCollator(tokenizer, 2),
        processing_class=tokenizer.tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.save_model()
    tokenizer.save_pretrained(str(arguments.output))


if __name__ == "__main__":
    main()
