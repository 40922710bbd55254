"""What a newcomer sees first: a real chat model that answers from a gist, and a small model that learns to gist.

Place in the flow: the top of the library, below the command line. ``base_model`` fetches the real model, ``trial``
compresses a prompt, answers side by side and distils, ``chat`` is that with the prompt and questions of this package,
and ``letters`` trains a model of its own from scratch, without data or network.
"""

from gisting.demo.letters import ANSWERS_AT_ONCE, BATCH_SIZE, DemoResult, run_demo, task_arguments, task_model

__all__ = ["ANSWERS_AT_ONCE", "BATCH_SIZE", "DemoResult", "run_demo", "task_arguments", "task_model"]
