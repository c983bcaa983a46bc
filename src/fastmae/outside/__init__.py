"""The doors for what comes from outside: a file, a document, tensors, the description of a network.

Whatever a stranger may have made enters through one of these functions. Each one bounds what reading may cost before it
reads, checks what it has read, and refuses in one line that names the file, the cause and the way out.
"""
