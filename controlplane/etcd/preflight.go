package etcd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// errDamaged is the error of files that etcd would choke on without a word, or
// crash on.
var errDamaged = errors.New("damaged")

// preflight looks at the files of an embedded store before etcd does: whether
// the log is there that belongs to the database, and whether the database file is
// as long as it says. etcd would wait for ever without the one, and read beyond the
// end of the other, which can't be caught.
func preflight(dir string) error {
	db := filepath.Join(dir, "member", "snap", "db")
	file, err := os.Open(db)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if err := checkDatabase(file); err != nil {
		return fmt.Errorf("%s: %w", db, err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal"))
	if err != nil {
		return err
	}
	if len(logs) == 0 {
		return fmt.Errorf("%s is %w: the log beside its database is missing", filepath.Join(dir, "member", "wal"), errDamaged)
	}
	return nil
}

// The layout of a bbolt file: two pages of meta data come first, and the valid one
// with the higher transaction counts. Numbers are in the order of the machine.
const (
	boltMagic      = 0xED0CDAED
	boltHeader     = 16 // bytes of a page's header
	boltMetaSize   = 64
	boltPageSizeAt = 8 // these are within the meta data
	boltPagesAt    = 40
	boltChecksumAt = 56
	maxPageSize    = 64 << 10
)

func checkDatabase(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	// The second page's place depends on the page size, which is not known when the
	// first one is damaged.
	pages, pageSize := int64(0), int64(0)
	for at := int64(0); at <= maxPageSize; at = max(2*at, 1024) {
		meta := make([]byte, boltMetaSize)
		if _, err := file.ReadAt(meta, at+boltHeader); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			return err
		}
		size := int64(binary.NativeEndian.Uint32(meta[boltPageSizeAt:]))
		if validMeta(meta) && (at == 0 || at == size) {
			pages, pageSize = max(pages, int64(binary.NativeEndian.Uint64(meta[boltPagesAt:]))), size
		}
	}
	switch {
	case pageSize == 0:
		return fmt.Errorf("it is %w: it does not begin as a database does", errDamaged)
	case pages*pageSize > info.Size():
		return fmt.Errorf("it is %w: it has %d bytes, and says that there are %d", errDamaged, info.Size(), pages*pageSize)
	}
	return nil
}

func validMeta(meta []byte) bool {
	sum := fnv.New64a()
	_, _ = sum.Write(meta[:boltChecksumAt])
	return binary.NativeEndian.Uint32(meta) == boltMagic && binary.NativeEndian.Uint64(meta[boltChecksumAt:]) == sum.Sum64()
}
