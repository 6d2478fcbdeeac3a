package harness

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// KeyringStatus is a keyring as `resealctl keyring status -o json` shows it.
type KeyringStatus struct {
	// Leader is the replica that rotates. It belongs to all keyrings.
	Leader string `json:"-"`

	Name               string         `json:"name"`
	Epochs             []EpochStatus  `json:"epochs"`
	Edges              []EdgeCoverage `json:"edges"`
	Laggards           []string       `json:"laggards"`
	ActivationDeadline time.Time      `json:"activationDeadline"`
	NextRotation       time.Time      `json:"nextRotation"`
	Problem            string         `json:"problem"`
}

// EpochStatus is an epoch of a keyring.
type EpochStatus struct {
	Number      uint64    `json:"number"`
	State       string    `json:"state"`
	PreparedAt  time.Time `json:"preparedAt"`
	ActivatedAt time.Time `json:"activatedAt"`
	RetiredAt   time.Time `json:"retiredAt"`
	EraseAt     time.Time `json:"eraseAt"`
}

// EdgeCoverage is what an edge has acked of a keyring.
type EdgeCoverage struct {
	Edge   string   `json:"edge"`
	Epochs []uint64 `json:"epochs"`
	Active uint64   `json:"active"`
}

// Epoch is an epoch by its number; its State is empty when there is none.
func (k KeyringStatus) Epoch(number uint64) EpochStatus {
	for _, epoch := range k.Epochs {
		if epoch.Number == number {
			return epoch
		}
	}
	return EpochStatus{}
}

// Active is the number of the epoch that encrypts, 0 when there is none.
func (k KeyringStatus) Active() uint64 {
	for _, epoch := range k.Epochs {
		if epoch.State == "active" {
			return epoch.Number
		}
	}
	return 0
}

// Newest is the number of the newest epoch, 0 when there is none.
func (k KeyringStatus) Newest() uint64 {
	if len(k.Epochs) == 0 {
		return 0
	}
	return k.Epochs[len(k.Epochs)-1].Number
}

// KeyringAt asks a replica about a keyring.
func (f *Fleet) KeyringAt(c *ControlPlane, name string) (KeyringStatus, error) {
	f.TB.Helper()
	result := f.TryCtlAt(c, "keyring", "status", name, "-o", "json")
	if result.Code != 0 {
		return KeyringStatus{}, fmt.Errorf("keyring status: %s", strings.TrimSpace(result.Stderr))
	}
	var answer struct {
		Leader   string          `json:"leader"`
		Keyrings []KeyringStatus `json:"keyrings"`
	}
	if err := json.Unmarshal([]byte(result.Stdout), &answer); err != nil {
		return KeyringStatus{}, fmt.Errorf("keyring status: %w in:\n%s", err, result.Stdout)
	}
	if len(answer.Keyrings) != 1 || answer.Keyrings[0].Name != name {
		return KeyringStatus{}, fmt.Errorf("keyring status %s: got %+v", name, answer.Keyrings)
	}
	answer.Keyrings[0].Leader = answer.Leader
	return answer.Keyrings[0], nil
}
