package keyring

import (
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Export is the keys that are held, in clear, for the process that takes this one's
// place.
func (h *Holder) Export() ([]byte, error) { return h.encode() }

// Inherit takes over what Export returned in another process; data is overwritten. It
// is called before Run, which then reads no kept keys.
func (h *Holder) Inherit(data []byte) error {
	defer clear(data)
	held := &resealv1.HoldResponse{}
	if err := proto.Unmarshal(data, held); err != nil {
		return err
	}
	h.inherited = true
	if err := h.apply(held, false); err != nil {
		return err
	}
	h.sweep(time.Now())
	h.readyIfHeld()
	return nil
}

// readyIfHeld notes that there are keys, if there are.
func (h *Holder) readyIfHeld() {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for _, ring := range h.rings {
		if len(ring.epochs) > 0 {
			signal(h.ready)
		}
	}
}
