package loop

import (
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// open gets a descriptor whose readiness Go's poller tells, which a TCPListener keeps
// to itself. Without one, connections are accepted as everywhere else.
func (a *Acceptor) open() {
	if a.group.cfg.Goroutines {
		return
	}
	file, err := a.listener.File()
	if err != nil {
		return
	}
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return
	}
	a.file, a.raw = file, raw
}

// direct accepts into the poller of a loop.
func (a *Acceptor) direct() (net.Conn, *Loop, error) {
	fd, from, err := -1, unix.Sockaddr(nil), error(nil)
	waitErr := a.raw.Read(func(listener uintptr) bool {
		for {
			fd, from, err = unix.Accept4(int(listener), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			if err != unix.EINTR && err != unix.ECONNABORTED {
				return err != unix.EAGAIN
			}
		}
	})
	if waitErr != nil {
		return nil, nil, waitErr
	}
	if err != nil {
		return nil, nil, os.NewSyscallError("accept4", err)
	}
	to := a.group.Next()
	conn, err := newFresh(to, fd, a.local(fd), addressOf(from))
	if err != nil {
		_ = unix.Close(fd)
		return nil, nil, err
	}
	return conn, to, nil
}

// local is the address of this end.
func (a *Acceptor) local(fd int) net.Addr {
	bound, ok := a.listener.Addr().(*net.TCPAddr)
	if ok && !bound.IP.IsUnspecified() {
		return bound
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return bound
	}
	return addressOf(name)
}

func addressOf(name unix.Sockaddr) net.Addr {
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: name.Addr[:], Port: name.Port}
	case *unix.SockaddrInet6:
		address := &net.TCPAddr{IP: name.Addr[:], Port: name.Port}
		if name.ZoneId != 0 {
			address.Zone = strconv.Itoa(int(name.ZoneId))
			if link, err := net.InterfaceByIndex(int(name.ZoneId)); err == nil {
				address.Zone = link.Name
			}
		}
		return address
	}
	return &net.TCPAddr{}
}
