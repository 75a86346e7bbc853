from zoosplat.stages.command import run
from zoosplat_evaluate.stage import STAGE

if __name__ == "__main__":
    run(STAGE)
