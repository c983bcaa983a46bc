"""`make gpu-check`, or without an installation: `python3 tools/gpu_check`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE.parents[1] / "src"), str(HERE.parent)]

if __name__ == "__main__":  # the processes that run the commands import this file too
    # Python puts this folder itself first, and other programs' `import inputs` would find the file here.
    sys.path = [*PATHS, *(path for path in sys.path if Path(path).resolve() != HERE)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    from gpu_check.main import main

    sys.exit(main(sys.argv[1:]))
