"""Fine-tunes a sparse image classifier, in the shape of the Hugging Face example of the same name.

    python scripts/run_image_classification.py \\
        --model_name_or_path resnet20-cifar10 --dataset_name digits \\
        --do_train --do_eval --num_train_epochs 3 --per_device_train_batch_size 32 --learning_rate 1e-3 \\
        --output_dir out/digits

A JSON file with the same names is accepted in place of the options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, set_seed

from sparse_ft import SparseTrainingArguments
from sparse_ft.data import load_data, prepare
from sparse_ft.finetune import ModelChoice, card_entries, load_for_training, make_trainer


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        metadata={"help": "A bundled name, a local folder, timm/ARCHITECTURE, or a Hub id."},
    )
    pretrained: bool = field(
        default=False, metadata={"help": "For timm/ARCHITECTURE: timm's default weights instead of random ones."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the login's by default."})


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "digits, a local folder or file, or a Hub id of a dataset."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of training images, a subfolder per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of evaluation images, likewise."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the classes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most so many evaluation images."})
    image_size: int | None = field(default=None, metadata={"help": "Side length in pixels instead of the model's."})
    augment: str = field(default="auto", metadata={"help": "Random crops and mirroring: none, light or standard."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            raise ValueError("give either dataset_name or train_dir")


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, SparseTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(str(Path(sys.argv[1]).resolve()))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    source = data_args.dataset_name or {"train": data_args.train_dir}
    if data_args.train_dir and data_args.validation_dir:
        source["validation"] = data_args.validation_dir
    data = load_data(
        source,
        task="image-classification",
        config=data_args.dataset_config_name,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
        seed=training_args.seed,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
    )
    choice = ModelChoice(
        model_args.model_name_or_path, model_args.pretrained, model_args.model_revision, model_args.token
    )
    set_seed(training_args.seed)
    model, processor = load_for_training(choice, data)
    prepared = prepare(
        data,
        model,
        processor,
        augment=data_args.augment,
        image_size=data_args.image_size,
        seed=training_args.seed,
    )
    trainer = make_trainer(model, prepared, training_args, card=card_entries(choice, data))
    for note in data.notes:
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
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
