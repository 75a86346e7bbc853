from zoosplat.stages.stopping import run_stoppable


def main() -> int:
    from zoosplat.stages import command
    from zoosplat_train import torchrun
    from zoosplat_train.stage import STAGE, train

    return torchrun.run_rank(STAGE, train) if torchrun.is_torchrun() else command.main(STAGE)


if __name__ == "__main__":
    run_stoppable("train", main)
