"""``python -m layerlr_helpers.finetune --data DIR --output OUT``: fine-tune a network on your own images."""

from layerlr_helpers.finetune.job import main

if __name__ == "__main__":
    main()
