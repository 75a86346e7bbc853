from zoosplat.stages.stopping import run_stoppable


def main() -> int:
    from zoosplat.stages import command
    from zoosplat_train import parallel
    from zoosplat_train.stage import STAGE, train

    return parallel.run_under_torchrun(STAGE, train) if parallel.by_torchrun() else command.main(STAGE)


if __name__ == "__main__":
    run_stoppable("train", main)
