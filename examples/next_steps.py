"""Says what one may do after a run, with the run's own paths: the end of the quick start.

python -m examples.next_steps RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from examples.data.tasks import get_task
from examples.training.run_folder import CONFIG, RESULTS

QUICK_START = Path(__file__).resolve().parent.parent / "scripts" / "quickstart.sh"
GLUE = "--task_name mrpc --data_dir DIR --learning_rate 1e-3 --num_train_epochs 4"
SENTENCES = ("The pilot praised the mug.", "The aviator admired the cup.")


def snippet(run: Path) -> list[str]:
    """Lines of Python that load a run's result and let it judge a text.

    Args:
        run: folder of a finished run; its adapter is in PEFT's files, or it has a whole model.
    """
    options = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    task, base = get_task(options["task_name"]), options["model_name_or_path"]
    whole = (run / "model").is_dir()
    texts = ", ".join(f'["{text}"]' for text, _ in zip(SENTENCES, task.text, strict=False))
    start = str(run / "model") if whole else base
    loaded = f"AutoModelForSequenceClassification.from_pretrained({start!r}"
    lines = [
        "from transformers_patched import AutoModelForSequenceClassification, AutoTokenizer",
        f"model = {loaded}, num_labels={task.num_labels})",
    ]
    if not whole:
        lines += [
            "from peft_custom import PeftModel",
            f"model = PeftModel.from_pretrained(model, {str(run / 'adapter')!r})",
        ]
    names = "" if task.regression else f".softmax(-1))  # {', '.join(task.labels)}"
    return [
        *lines,
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})",
        f'batch = tokenizer({texts}, return_tensors="pt")',
        f"print(model.eval()(**batch).logits{names or ')'}",
    ]


def main(run: Path) -> None:
    """Prints them; nothing where `run` has no result."""
    if not (run / RESULTS).is_file():
        return
    print(f"\nNext, a task of GLUE:\n\n    bash {QUICK_START} {GLUE}")
    if (run / "model").is_dir() or (run / "adapter" / "adapter_config.json").is_file():
        print(f"\nor what this run has learnt, in {sys.executable}:\n")
        print("\n".join(f"    {line}".rstrip() for line in snippet(run)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
