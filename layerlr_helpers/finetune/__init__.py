"""The fine-tuning command: ``python -m layerlr_helpers.finetune --data DIR --output OUT``."""
