package manifest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// stdinName is what positions call the path "-".
const stdinName = "stdin"

// Load reads files, directories and, for the path "-", stdin, as Parse does. Of
// a directory it reads the files *.yaml, *.yml and *.json, sorted by name, not
// those of its subdirectories. A resource that appears twice, in one file or two,
// is an error.
//
// The error is Errors and holds everything that is wrong in all files; the
// objects are then those without an error.
func Load(paths []string, stdin io.Reader) ([]Object, error) {
	return load(paths, stdin, true)
}

// LoadNames is Load without the checks of Validate, for callers that only want
// to know which resources are named, such as a deletion.
func LoadNames(paths []string, stdin io.Reader) ([]Object, error) {
	return load(paths, stdin, false)
}

func load(paths []string, stdin io.Reader, validate bool) ([]Object, error) {
	p := newParser(validate)
	for _, path := range paths {
		if path == "-" {
			p.read(stdinName, stdin)
			continue
		}
		files, err := filesOf(path)
		if err != nil {
			p.errs.add(fileError(path, err))
			continue
		}
		for _, file := range files {
			p.open(file)
		}
	}
	return p.objects, p.errs.err()
}

// filesOf is the path itself, or the manifests of a directory.
func filesOf(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, entry := range entries {
		suffix := filepath.Ext(entry.Name())
		if !entry.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, suffix) {
			files = append(files, filepath.Join(path, entry.Name()))
		}
	}
	if len(files) == 0 {
		return nil, errors.New("the directory holds no *.yaml, *.yml or *.json file")
	}
	return files, nil
}

func (p *parser) open(name string) {
	file, err := os.Open(name)
	if err != nil {
		p.errs.add(fileError(name, err))
		return
	}
	defer file.Close()
	p.read(name, file)
}

func (p *parser) read(name string, r io.Reader) {
	// One byte more than allowed, so that a file that is too large is told
	// from one that just fits.
	data, err := io.ReadAll(io.LimitReader(r, maxFileBytes+1))
	if err != nil {
		p.errs.add(fileError(name, err))
		return
	}
	p.parseFile(name, data)
}

// fileError drops the path that file errors repeat.
func fileError(name string, err error) Error {
	if pathErr, ok := errors.AsType[*fs.PathError](err); ok {
		err = pathErr.Err
	}
	return Error{File: name, Message: fmt.Sprint(err)}
}
