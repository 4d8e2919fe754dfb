"""The runnable: drivers that give the cores of `mesh` a clock, sockets, disks and processes."""
