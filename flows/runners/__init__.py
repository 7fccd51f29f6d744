"""Engines that trials run on, behind one port."""
