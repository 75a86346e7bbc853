"""`zoosplat view`: an experiment in the browser, while it runs or when it is done."""
