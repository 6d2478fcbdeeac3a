//go:build !linux

package loop

import "net"

func newWaiter(Config) (waiter, error) { return newChannel(), nil }

func newSource(g *Group, conn net.Conn) (source, error) { return newPump(g, conn), nil }
