"""The platform team's side: image, fleet profiles, VM clusters, a Ray cluster of several nodes on one machine."""
