import sys

from zoosplat.stages.command import run
from zoosplat_train import parallel
from zoosplat_train.stage import STAGE, train

if __name__ == "__main__":
    if parallel.by_torchrun():
        sys.exit(parallel.run_under_torchrun(STAGE, train))
    run(STAGE)
