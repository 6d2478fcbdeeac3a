// Package upgrade is how a running edge gives its place to a new process: the order in
// which the two speak, what passes between them, and how the new one is started.
//
// The old process is the predecessor, the new one its successor. They speak over a
// socket that the successor inherits and nobody else can reach:
//
//	successor                     predecessor
//	hello{oldest, newest} ─────►
//	                      ◄─────  welcome{protocol, terms}, or refused{reason}
//	                      ◄─────  part…      sockets, the state's lock, configuration, keys
//	                      ◄─────  offered
//	ready, or failed{reason} ───►            its plan is in force, nothing is served yet
//	                      ◄─────  part…      sessions, health: as of this moment
//	                      ◄─────  go
//	serving ────────────────────►            it accepts connections
//	                      ◄─────  part…      counters
//	                      ◄─────  yours      the state is the successor's from here on
//	                      ◄─────  part… progress{…}    again and again, while it drains
//	                      ◄─────  part… ended
//
// Until "serving" the predecessor does everything as before, and whatever goes wrong
// ends the successor and nothing else. With "yours" the predecessor has stopped to
// speak with the control plane, to write its state and to accept connections: of each,
// one process does it at any moment. Between "serving" and "yours" both accept, so no
// connection waits.
//
// A process takes protocols from oldest to newest, and both take the newest that they
// share. Parts are named; those that a successor doesn't know it leaves alone, so a
// release may hand over more, or less, without another protocol.
package upgrade

import (
	"errors"
	"os"
	"time"
)

const (
	// oldest and newest are the protocols that this release speaks.
	oldest = 1
	newest = 1
)

const (
	// startTime is how long a successor may take until it is ready.
	startTime = 60 * time.Second
	// stepTime is how long either side may take for any other step. None of them waits
	// for the network.
	stepTime = 15 * time.Second
)

var (
	// ErrRefused is the error of a successor that the predecessor does not hand over to.
	ErrRefused = errors.New("the running process refuses to be replaced")
	// ErrLost is the error when the other process has ended, or closed the socket.
	ErrLost = errors.New("the other process has ended")
	// ErrProtocol is the error for what the other process must not say.
	ErrProtocol = errors.New("the other process broke the upgrade protocol")
)

// Names of parts.
const (
	// PartListener is the listening socket of a listener; its key is that of the
	// frontend, mostly the address as configured.
	PartListener = "listener"
	// PartSocket is a listening socket that the process was started with, as by systemd,
	// and that no listener uses; its key is its address.
	PartSocket = "socket"
	// PartAdmin is the listening socket of the admin page; its key is the flag's value.
	PartAdmin = "admin"
	// PartStateLock is the locked file of the state directory.
	PartStateLock = "state-lock"
	// PartConfiguration is the configuration in force, PartKeys the ticket keys, PartSessions
	// the sessions with backends, PartHealth what is known of endpoints, and PartCounters
	// what was counted.
	PartConfiguration = "configuration"
	PartKeys          = "keys"
	PartSessions      = "sessions"
	PartHealth        = "health"
	PartCounters      = "counters"
)

// Part is something that is handed over.
type Part struct {
	// Name is one of the constants, Key tells parts of one name apart.
	Name, Key string
	// Data is its content, which may be secret.
	Data []byte
	// File goes over as a descriptor. Whoever gets it closes it.
	File *os.File
}

// Terms are what a successor must know first.
type Terms struct {
	// Protocol is the one that both speak.
	Protocol int `json:"protocol"`
	// BootID and StartedAt stay the same over upgrades: to the control plane and to
	// whoever reads counters nothing has started anew.
	BootID    string    `json:"boot_id"`
	StartedAt time.Time `json:"started_at"`
	// PID and Version are the predecessor's.
	PID     int    `json:"pid"`
	Version string `json:"version"`
	// Draining is set when clients are asked to leave, as an operator wishes.
	Draining bool `json:"draining,omitempty"`
}

// Progress is how far a predecessor is that drains.
type Progress struct {
	// Connections are those of clients that are still open.
	Connections int `json:"connections"`
}

// hello is what a successor begins with.
type hello struct {
	Oldest  int    `json:"oldest"`
	Newest  int    `json:"newest"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
}

// reason says why something did not go on.
type reason struct {
	Reason string `json:"reason"`
}

// agree is the protocol that both sides speak, or 0.
func agree(h hello) int {
	common := min(newest, h.Newest)
	if common < max(oldest, h.Oldest) {
		return 0
	}
	return common
}

// closeFiles closes the files of parts that nobody wants.
func closeFiles(parts []Part) {
	for _, part := range parts {
		if part.File != nil {
			_ = part.File.Close()
		}
	}
}
