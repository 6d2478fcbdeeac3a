//go:build !linux

package loop

import "net"

func newWaiter(Config) (waiter, error) { return newChannel(), nil }

func newSource(to *Loop, conn net.Conn) (source, error) { return newPump(to.group, conn), nil }
