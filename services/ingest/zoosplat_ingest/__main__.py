from zoosplat.stages.command import run
from zoosplat_ingest.stage import STAGE

if __name__ == "__main__":
    run(STAGE)
