# Builds shardtune and runs the demo inside an image, from nothing but Debian:
#   docker build -f docker/cpu.Dockerfile -t shardtune .          (about 6 GB of disk while building)
#   docker run --rm -it --shm-size=1g shardtune                   a shell with the program on the path
FROM debian:12

# In a container everybody is root, and there are often fewer cores than ranks; Open MPI refuses both unless told.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_mpi_yield_when_idle=1 \
    OMPI_MCA_hwloc_base_binding_policy=none \
    OMPI_MCA_btl_vader_single_copy_mechanism=none

WORKDIR /opt/shardtune

# What changes rarely comes first, so that a change of the sources does not fetch packages and LibTorch again.
COPY scripts scripts
RUN scripts/bootstrap

COPY . .
RUN scripts/build shardtune
ENV PATH=/opt/shardtune/build/release:$PATH
RUN scripts/demo

CMD ["bash"]
