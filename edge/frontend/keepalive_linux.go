package frontend

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Go's own values for how long a client is silent before it is asked whether it is
// there, for how long an answer is waited, and for how often it is asked.
const (
	keepAliveSeconds = 15
	keepAliveProbes  = 9
)

// keepAlive has the kernel find clients that are gone without a word. Connections
// have what their listener has; Go would set it on each of them, by four system
// calls.
func keepAlive(config *net.ListenConfig) {
	before := config.Control
	config.KeepAlive = -1
	config.Control = func(network, address string, conn syscall.RawConn) error {
		err := errors.Join(
			setOption(conn, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			setOption(conn, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveSeconds),
			setOption(conn, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveSeconds),
			setOption(conn, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveProbes),
		)
		if err != nil || before == nil {
			return err
		}
		return before(network, address, conn)
	}
}
