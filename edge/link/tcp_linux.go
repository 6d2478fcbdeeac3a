package link

import (
	"context"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// dialTCP connects to a replica. gRPC would have the kernel give up after pingTimeout, on
// connections that are not wrapped.
func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		if err := raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
		}); err != nil {
			return err
		}
		return failed
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return own{conn}, nil
}

// own is a connection whose options are ours.
type own struct{ net.Conn }
