from zoosplat.stages.command import run
from zoosplat_center_rotation.stage import STAGE

if __name__ == "__main__":
    run(STAGE)
