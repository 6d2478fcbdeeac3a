// Package backup writes all that a control plane keeps in etcd into a file, sealed
// with the key-encryption key, and restores it into an empty etcd.
//
// The file is a magic word and a random id of 16 bytes, and then frames: 4 bytes of
// length, big endian, and a sealed list of keys. A frame's context, which must be the
// same to unseal it, is the file's id, the frame's number, and whether it is the last:
// frames can't be left out, mixed or added.
package backup

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

const (
	magic = "RSLBACK1"
	// maxFrame bounds a frame, in bytes.
	maxFrame = 256 << 20
	// frameSize is how many bytes of keys and values make a frame.
	frameSize = 1 << 20
)

// ErrDamaged is the error of a file that is not a whole backup.
var ErrDamaged = errors.New("not a whole backup")

// Cipher seals and unseals with the key-encryption key.
type Cipher interface {
	Seal(plaintext, context []byte) ([]byte, error)
	Unseal(sealed, context []byte) ([]byte, error)
}

// entry is a key of etcd.
type entry struct {
	Key      string `json:"k"`
	Value    []byte `json:"v"`
	Revision int64  `json:"r"` // of its last write
}

func frameContext(id []byte, number uint64, last bool) []byte {
	context := append([]byte("reseal backup\x00"), id...)
	context = binary.BigEndian.AppendUint64(context, number)
	if last {
		return append(context, 1)
	}
	return append(context, 0)
}

// writeFrame seals entries into w.
func writeFrame(w io.Writer, cipher Cipher, id []byte, number uint64, last bool, entries []entry) error {
	plain, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	sealed, err := cipher.Seal(plain, frameContext(id, number, last))
	if err != nil {
		return err
	}
	if len(sealed) > maxFrame {
		return fmt.Errorf("a frame of %d bytes, at most %d are allowed", len(sealed), maxFrame)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(sealed))), sealed...))
	return err
}

// read returns all entries of a file, when all of it is sound. Errors: ErrDamaged, and
// those of the cipher.
func read(r io.Reader, cipher Cipher) ([]entry, error) {
	head := make([]byte, len(magic)+16)
	if _, err := io.ReadFull(r, head); err != nil || string(head[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: it does not begin as one", ErrDamaged)
	}
	id := head[len(magic):]
	var all []entry
	for number := uint64(0); ; number++ {
		sealed, err := readFrame(r)
		if err != nil {
			return nil, err
		}
		last := false
		plain, err := cipher.Unseal(sealed, frameContext(id, number, false))
		if err != nil {
			var other error
			if plain, other = cipher.Unseal(sealed, frameContext(id, number, true)); other != nil {
				return nil, fmt.Errorf("frame %d: %w", number, err)
			}
			last = true
		}
		var entries []entry
		if err := json.Unmarshal(plain, &entries); err != nil {
			return nil, fmt.Errorf("%w: frame %d can't be read", ErrDamaged, number)
		}
		all = append(all, entries...)
		if !last {
			continue
		}
		if n, _ := io.ReadFull(r, make([]byte, 1)); n > 0 {
			return nil, fmt.Errorf("%w: something follows its end", ErrDamaged)
		}
		return all, nil
	}
}

func readFrame(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, fmt.Errorf("%w: it is cut short", ErrDamaged)
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > maxFrame {
		return nil, fmt.Errorf("%w: a frame of %d bytes", ErrDamaged, size)
	}
	sealed, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil || len(sealed) < int(size) {
		return nil, fmt.Errorf("%w: it is cut short", ErrDamaged)
	}
	return sealed, nil
}
