"""Lanes: trials that train side by side, with one program for all."""
