from zoosplat.stages.process import service

if __name__ == "__main__":
    service("center_rotation")
