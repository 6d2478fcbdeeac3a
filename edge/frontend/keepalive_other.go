//go:build !linux

package frontend

import "net"

// keepAlive leaves connections what Go sets on each of them.
func keepAlive(*net.ListenConfig) {}
