"""What the machine gives: files, threads, memory, child processes, and what comes from outside."""
