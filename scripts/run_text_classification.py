"""Fine-tunes a sparse text classifier, in the shape of the Hugging Face example of the same name.

    python scripts/run_text_classification.py \\
        --model_name_or_path user/sparse-bert --dataset_name nyu-mll/glue --dataset_config_name sst2 \\
        --do_train --do_eval --num_train_epochs 3 --per_device_train_batch_size 32 --learning_rate 1e-4 \\
        --output_dir out/sst2

A JSON file with the same names is accepted in place of the options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser, set_seed

from sparse_ft import SparseTrainingArguments
from sparse_ft.data import load_data, prepare
from sparse_ft.finetune import ModelChoice, card_entries, load_for_training, make_trainer


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A local folder or a Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the login's by default."})


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "A local folder or file, or a Hub id of a dataset."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "A file of the same format to evaluate on."})
    text_column_names: str | None = field(
        default=None, metadata={"help": "Column of the texts, or two of sentence pairs, separated by a comma."}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the classes."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens of a text; 128 by default."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most so many evaluation rows."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("give either dataset_name or train_file")


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, SparseTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(str(Path(sys.argv[1]).resolve()))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    source = data_args.dataset_name or {"train": data_args.train_file}
    if data_args.train_file and data_args.validation_file:
        source["validation"] = data_args.validation_file
    data = load_data(
        source,
        task="text-classification",
        config=data_args.dataset_config_name,
        text_columns=data_args.text_column_names.split(",") if data_args.text_column_names else (),
        label_column=data_args.label_column_name,
        seed=training_args.seed,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
    )
    choice = ModelChoice(model_args.model_name_or_path, revision=model_args.model_revision, token=model_args.token)
    set_seed(training_args.seed)
    model, processor = load_for_training(choice, data)
    prepared = prepare(data, model, processor, max_length=data_args.max_seq_length)
    trainer = make_trainer(model, prepared, training_args, card=card_entries(choice, data))
    for note in [*data.notes, *prepared.notes]:
        trainer.announce(note)

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        predictions = trainer.predict(prepared.eval, metric_key_prefix="predict").predictions
        names = [data.label_names[i] for i in np.asarray(predictions)]
        rows = "\n".join(f"{row}\t{name}" for row, name in enumerate(names))
        Path(training_args.output_dir, "predict_results.txt").write_text(f"index\tprediction\n{rows}\n")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
