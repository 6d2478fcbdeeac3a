package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxConfigBytes bounds the file with contexts.
const maxConfigBytes = 4 << 20

// contextFile is the file with contexts.
type contextFile struct {
	CurrentContext string         `yaml:"currentContext"`
	Contexts       []namedContext `yaml:"contexts"`
}

// namedContext is one context: where a control plane is and who we are there.
type namedContext struct {
	Name           string   `yaml:"name"`
	ControlPlane   []string `yaml:"controlPlane,flow"`
	TrustDomain    string   `yaml:"trustDomain"`
	CAPEM          string   `yaml:"caPem"`
	CertificatePEM string   `yaml:"certificatePem"`
	PrivateKeyPEM  string   `yaml:"privateKeyPem"`
}

// find returns the context of a name, or nil.
func (f *contextFile) find(name string) *namedContext {
	for i := range f.Contexts {
		if f.Contexts[i].Name == name {
			return &f.Contexts[i]
		}
	}
	return nil
}

// put adds c, or replaces the context of its name, and says which.
func (f *contextFile) put(c namedContext) string {
	if old := f.find(c.Name); old != nil {
		*old = c
		return "updated"
	}
	f.Contexts = append(f.Contexts, c)
	return "created"
}

// names are the names of all contexts.
func (f *contextFile) names() []string {
	names := make([]string, len(f.Contexts))
	for i, c := range f.Contexts {
		names[i] = c.Name
	}
	return names
}

// configPath is where the contexts are.
func (a *app) configPath() (string, error) {
	if a.settings.config != "" {
		return a.settings.config, nil
	}
	if dir := a.getenv("XDG_CONFIG_HOME"); dir != "" {
		return filepath.Join(dir, "reseal", "config.yaml"), nil
	}
	home := a.getenv("HOME")
	if home == "" {
		return "", errors.New("no file with contexts: neither --config nor RESEAL_CONFIG, XDG_CONFIG_HOME or HOME is set")
	}
	return filepath.Join(home, ".config", "reseal", "config.yaml"), nil
}

// loadContexts reads the file with contexts. A file that does not exist holds
// none; exists says which it is.
func (a *app) loadContexts() (file *contextFile, path string, exists bool, err error) {
	path, err = a.configPath()
	if err != nil {
		return nil, "", false, err
	}
	file, err = a.readContexts(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &contextFile{}, path, false, nil
	}
	return file, path, true, err
}

// readContexts reads one file with contexts, and warns when others can read the
// keys in it.
func (a *app) readContexts(path string) (*contextFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigBytes {
		return nil, fmt.Errorf("%s: larger than %d bytes: not a file with contexts", path, maxConfigBytes)
	}
	file, err := parseContexts(path, data)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 && file.hasKeys() {
		a.warnf("Warning: %s holds private keys and others may open it (mode %04o). Run: chmod 600 %s\n",
			path, info.Mode().Perm(), path)
	}
	return file, nil
}

func parseContexts(path string, data []byte) (*contextFile, error) {
	file := &contextFile{}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(file); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	seen := make(map[string]bool, len(file.Contexts))
	for i, c := range file.Contexts {
		switch {
		case c.Name == "":
			return nil, fmt.Errorf("%s: contexts[%d] has no name", path, i)
		case seen[c.Name]:
			return nil, fmt.Errorf("%s: context %q is there twice", path, c.Name)
		}
		seen[c.Name] = true
	}
	return file, nil
}

func (f *contextFile) hasKeys() bool {
	for _, c := range f.Contexts {
		if c.PrivateKeyPEM != "" {
			return true
		}
	}
	return false
}

// writeContexts replaces the file with contexts as a whole, with mode 0600.
func writeContexts(path string, file *contextFile) error {
	data, err := encodeContexts(file)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// A link stays a link: what it points to is replaced.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path, dir = target, filepath.Dir(target)
	}
	// CreateTemp makes files with mode 0600.
	temp, err := os.CreateTemp(dir, ".config-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	_, err = temp.Write(data)
	if err == nil {
		err = temp.Sync()
	}
	if closeErr := temp.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}

func encodeContexts(file *contextFile) ([]byte, error) {
	var data bytes.Buffer
	encoder := yaml.NewEncoder(&data)
	encoder.SetIndent(2)
	if err := encoder.Encode(file); err != nil {
		return nil, err
	}
	return data.Bytes(), encoder.Close()
}
