#!/bin/bash
# One host: runs inside new mount, pid, uts and ipc namespaces (the network namespace is joined
# before), makes /tmp, /run, /mnt, /dev/shm and the home private, and becomes its sshd.
#
#   host.sh NAME LAB PREFIX PYTHON HOME
#
# LAB     folder of the test: LAB/id.pub may log in, LAB/shared is /mnt/ray_subnets on every host
# PREFIX  virtual environment; what the host installs into it goes to a layer of its own
# PYTHON  the installation that the environment belongs to
set -euo pipefail
NAME=$1 LAB=$2 PREFIX=$3 PYTHON=$4 HOME=$5
OWN=$LAB/$NAME

mount --make-rprivate /
mount -t proc proc /proc
hostname "$NAME"

# Everything that must survive the covering of /tmp and of the home is held open by a bind mount.
mkdir -p "$OWN"/{upper,work,home,tmp,held/venv,held/python,held/lab}
mount -t overlay overlay -o "lowerdir=$PREFIX,upperdir=$OWN/upper,workdir=$OWN/work" "$OWN/held/venv"
mount --rbind "$PYTHON" "$OWN/held/python"
mount --rbind "$LAB/shared" "$OWN/held/lab"
cp "$LAB/id.pub" "$LAB/hostkey" "$OWN/tmp/"

mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
mkdir -p /run/sshd /run/held /mnt/ray_subnets
mount --rbind "$OWN/held" /run/held
mount --rbind /run/held/lab /mnt/ray_subnets
mount --bind "$OWN/home" "$HOME"
mount --rbind "$OWN/tmp" /tmp
mkdir -p "$PREFIX" "$PYTHON" "$HOME/.ssh"
mount --rbind /run/held/python "$PYTHON"
mount --rbind /run/held/venv "$PREFIX"

chmod 700 "$HOME" "$HOME/.ssh"
mv /tmp/id.pub "$HOME/.ssh/authorized_keys"
mv /tmp/hostkey /run/sshd/hostkey
chmod 600 "$HOME/.ssh/authorized_keys" /run/sshd/hostkey
# A machine of one core. Ray gives its workers a low priority, within all of this machine: on a busy
# one they would not get on.
cat > "$HOME/.bashrc" <<'END'
export RAY_OVERRIDE_RESOURCES='{"CPU":1}' RAY_worker_niceness=0
END
exec env -i HOME="$HOME" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/sbin/sshd -D -e -h /run/sshd/hostkey -o UsePAM=no -o PidFile=none -o StrictModes=no \
    -o PermitRootLogin=yes -o PasswordAuthentication=no
