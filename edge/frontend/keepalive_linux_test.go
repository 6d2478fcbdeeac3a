package frontend

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKeepAlive: connections have from their listener what Go would set on each.
func TestKeepAlive(t *testing.T) {
	listener := must[*net.TCPListener](t)(listen("127.0.0.1:0", false))
	defer listener.Close()
	client := must[net.Conn](t)(net.Dial("tcp", listener.Addr().String()))
	defer client.Close()
	conn := must[*net.TCPConn](t)(listener.AcceptTCP())
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []struct{ level, name, want int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepAliveSeconds},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepAliveSeconds},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveProbes},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	} {
		var got int
		var err error
		if failed := raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), option.level, option.name) }); failed != nil {
			t.Fatal(failed)
		}
		if err != nil || got != option.want {
			t.Errorf("option %d is %d, %v, want %d", option.name, got, err, option.want)
		}
	}
}
