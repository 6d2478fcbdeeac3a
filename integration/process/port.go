package process

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
)

// The range lies below Linux's ephemeral ports, so that no outgoing connection
// takes a port between its choice and its use.
const firstPort, lastPort = 20000, 31999

// reserved holds the locks of the ports that this process chose. They live as
// long as the process.
var reserved struct {
	sync.Mutex
	locks []net.Listener
}

// FreePort chooses a TCP port of 127.0.0.1 that nobody listens on. No other
// caller on this machine gets it while this process lives.
func FreePort() (int, error) {
	for range 200 {
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		lock, err := net.Listen("unix", fmt.Sprintf("@reseal-integration-port-%d", port))
		if err != nil {
			continue
		}
		probe, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			_ = lock.Close()
			continue
		}
		_ = probe.Close()
		reserved.Lock()
		reserved.locks = append(reserved.locks, lock)
		reserved.Unlock()
		return port, nil
	}
	return 0, errors.New("no free TCP port between 20000 and 31999")
}

// FreeAddress is 127.0.0.1 with a port of FreePort.
func FreeAddress() (string, error) {
	port, err := FreePort()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", port), nil
}

// Listening reports an error unless someone accepts connections at address.
func Listening(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}
