"""The tests of the bridges need the libraries that they lead to: `make integrations` installs them and runs the tests.

Where a library is missing, as in the environment of the other tests, its file is not collected.
"""

from importlib.util import find_spec

NEEDED = {"accelerate": ["accelerate"], "bitsandbytes": ["bitsandbytes"],
          "everyday": ["timm", "transformers", "peft", "lightning", "torchmetrics", "accelerate"], "fastai": ["fastai"],
          "hugging_face": ["transformers", "accelerate", "peft"], "lightning": ["lightning", "peft", "transformers"],
          "lora": ["peft", "transformers"], "schedule_free": ["schedulefree"], "timm": ["timm"]}

collect_ignore = [f"test_{name}.py" for name, libraries in NEEDED.items() if not all(map(find_spec, libraries))]
