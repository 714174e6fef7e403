"""What the programs share, a file each:

command_line   options, error messages, the process before NumPy is imported
text           files to tokens and back, held-out text
training       one training step, on all cores
processes      one model on several processes, with MPI
checkpoint     a model on disk
run            a run on disk: its folder, log, plot and checkpoints
own_layer      a reader's own mixing layer, loaded and checked

They import grassmann.py and each other, never a program.
"""
