//go:build !linux

package loop

import (
	"errors"
	"net"
)

func (a *Acceptor) open() {}

func (a *Acceptor) direct() (net.Conn, *Loop, error) { return nil, nil, errors.ErrUnsupported }
