package frontend

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A listener's address may become wider, as from 127.0.0.1:443 to :443, or
// narrower, without a moment in which nobody accepts. The kernel gives each
// connection to the most specific socket, and closing a socket resets what waits
// in its queue. So the narrower socket is kept, for the wider listener, as long
// as there is a wider one; and the wider one accepts what its queue still holds
// before it is closed for a narrower one.

// lastAccepts is how long a socket that is closed for a narrower one goes on.
// Connections under way need about one round trip.
const lastAccepts = 250 * time.Millisecond

// listen binds an address. beside allows that sockets of ours with SO_REUSEPORT
// overlap.
func listen(address string, beside bool) (*net.TCPListener, error) {
	var config net.ListenConfig
	if beside {
		config.Control = func(_, _ string, conn syscall.RawConn) error { return reusePort(conn, true) }
	}
	keepAlive(&config)
	listener, err := config.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, err
	}
	return listener.(*net.TCPListener), nil
}

// reusePort sets or clears SO_REUSEPORT.
func reusePort(conn syscall.RawConn, on bool) error {
	value := 0
	if on {
		value = 1
	}
	return setOption(conn, unix.SOL_SOCKET, unix.SO_REUSEPORT, value)
}

func setOption(conn syscall.RawConn, level, name, value int) error {
	var err error
	if failed := conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) }); failed != nil {
		return failed
	}
	return err
}

func (s *socket) reusePort(on bool) error {
	conn, err := s.listener.SyscallConn()
	if err != nil {
		return err
	}
	return reusePort(conn, on)
}

// bindBeside binds an address that overlaps with those of sockets in use. They
// allow that only for this moment, so that no other process can join in later.
func (c *Change) bindBeside(next *state) error {
	f, key := c.frontend, next.socketKey()
	if f.socket(key) != nil {
		return nil
	}
	f.mu.Lock()
	var others []*socket
	for other, socket := range f.sockets {
		if overlap(other, key) {
			others = append(others, socket)
		}
	}
	f.mu.Unlock()
	for _, other := range others {
		if err := other.reusePort(true); err != nil {
			return err
		}
		defer func() { _ = other.reusePort(false) }() // as it was
	}
	listener, err := listen(next.Spec.GetAddress(), true)
	if err != nil {
		return err
	}
	bound := newSocket(listener)
	c.bound[key] = bound
	return bound.reusePort(false)
}

// keep keeps a socket that no listener names any more but one covers, and closes
// one later whose connections a narrower one gets now. It reports false for any
// other. f.mu is held.
func (c *Change) keep(key string, s *socket, moved map[*slot]bool) bool {
	f := c.frontend
	for _, next := range c.next {
		switch slot := f.slots[next.Name]; {
		case !overlap(next.socketKey(), key):
		case isWide(next.socketKey()):
			if old := s.owner.Swap(slot); old != slot {
				moved[old] = true
				s.wake()
			}
			return true
		case s.owner.Load() == slot:
			delete(f.sockets, key)
			f.spawn("a socket was closed", s.finish)
			return true
		}
	}
	return false
}

// finish accepts for a moment more and closes the socket.
func (s *socket) finish() {
	timer := time.NewTimer(lastAccepts)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.closed.Done():
	}
	s.close()
}

// socket is that of a key, or nil.
func (f *Frontend) socket(key string) *socket {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sockets[key]
}

// overlaps reports whether an address overlaps with that of another socket.
func (f *Frontend) overlaps(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for other := range f.sockets {
		if overlap(other, key) {
			return true
		}
	}
	return false
}

// overlap reports whether of two different addresses with one port one is for
// all interfaces. Keys with port 0 hold a listener's name and overlap with none.
func overlap(one, other string) bool {
	port := keyPort(one)
	return one != other && port == keyPort(other) && !strings.HasPrefix(port, "0 ") && (isWide(one) || isWide(other))
}

// keyPort is what follows the last colon.
func keyPort(key string) string { return key[strings.LastIndexByte(key, ':')+1:] }

// isWide reports whether an address is for all interfaces.
func isWide(key string) bool {
	host, _, err := net.SplitHostPort(key)
	if err != nil {
		return false
	}
	address, err := netip.ParseAddr(host)
	return host == "" || err == nil && address.IsUnspecified()
}
