"""Devices and processes of a run: mesh, launch, tables of GPUs and TPUs, compiler settings."""
