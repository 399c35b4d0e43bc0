"""Speed and memory, minivla beside LeRobot: same weights, same machine, same run. `make bench`."""
