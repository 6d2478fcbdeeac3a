package process

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrPrivilege means that this process may not make network namespaces.
var ErrPrivilege = errors.New("network namespaces need root or CAP_SYS_ADMIN")

// Network is a network namespace with a loopback interface of its own: for what
// runs in it, a host apart. Several edges on one machine can thus listen on the
// same address, as those of a fleet do. Its methods may be called from any
// goroutine.
type Network struct{ namespace *os.File }

// NewNetwork makes a namespace. It lives until it is closed and what runs in it
// has ended. Errors: ErrPrivilege.
func NewNetwork() (*Network, error) {
	n := &Network{}
	// The thread that leaves the namespace of the process is not used for
	// anything else.
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // until the thread ends
		failed <- n.make()
	}()
	if err := <-failed; err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (n *Network) make() error {
	err := unix.Unshare(unix.CLONE_NEWNET)
	if errors.Is(err, unix.EPERM) {
		return ErrPrivilege
	}
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	if n.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	return raiseLoopback()
}

func raiseLoopback() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(socket, unix.SIOCGIFFLAGS, loopback); err != nil {
		return fmt.Errorf("loopback interface: %w", err)
	}
	loopback.SetUint16(loopback.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, loopback); err != nil {
		return fmt.Errorf("loopback interface: %w", err)
	}
	return nil
}

// Close lets the namespace end with what still runs in it.
func (n *Network) Close() {
	if n.namespace != nil {
		_ = n.namespace.Close()
	}
}

// within calls do on a thread that is in the namespace. It must not start a
// goroutine for which that would matter.
func (n *Network) within(do func() error) error {
	runtime.LockOSThread()
	outside, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { _ = outside.Close() }()
	if err := unix.Setns(int(n.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering a network namespace: %w", err)
	}
	failed := do()
	if err := unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET); err != nil {
		// Locked, the thread ends with its goroutine.
		return errors.Join(failed, fmt.Errorf("leaving a network namespace: %w", err))
	}
	runtime.UnlockOSThread()
	return failed
}

// Dial connects to an address in the namespace, which must be an IP address with
// a port.
func (n *Network) Dial(ctx context.Context, address string) (conn net.Conn, err error) {
	err = n.within(func() error {
		// With an IP address the socket is made on this very thread.
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

// Listen listens on an address in the namespace.
func (n *Network) Listen(address string) (listener net.Listener, err error) {
	err = n.within(func() error {
		listener, err = net.Listen("tcp", address)
		return err
	})
	return listener, err
}
